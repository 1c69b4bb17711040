"""What runs without smoltrain: the model class that exports carry along, and the script that reloads an export."""
