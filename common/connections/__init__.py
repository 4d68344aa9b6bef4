"""Connections to Redis and the Celery app: time-outs, outages, Sentinel, secrets."""
