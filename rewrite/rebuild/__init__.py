"""The model back in its library: settings with which its own class has a program's sizes and does what the program does."""
