"""The Celery side: message in, message out. One module per queue."""
