"""What a pass can promise, and the proof that it kept its word."""
