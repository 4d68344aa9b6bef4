"""What a run reports: metrics, heartbeats, queues, the load per queue, and the cause of a stall."""
