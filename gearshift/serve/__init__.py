"""What talks to a person or a program: the terminal chat (and, later, a server)."""
