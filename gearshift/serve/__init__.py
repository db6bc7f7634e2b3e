"""What talks to a person or a program: the terminal chat, and the HTTP server with its parts."""
