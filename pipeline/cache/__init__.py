"""What passes have made, kept for later runs."""
