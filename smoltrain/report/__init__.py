"""`smoltrain report`: a run as one HTML page that needs nothing else, for a desk and for a phone."""
