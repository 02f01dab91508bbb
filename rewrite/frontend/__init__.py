"""From a module to a program: trace, see the eager run, flatten, align both modes, lift operators into layers."""
