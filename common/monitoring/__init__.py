"""What a run reports: metrics, heartbeats, queues, and the cause of a stall."""
