"""HTTP/1.1 on the socket, and the layers around the application."""
