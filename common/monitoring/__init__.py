"""What a run says of itself: metrics, heartbeats, queues, and why it does not move."""
