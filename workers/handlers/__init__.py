"""What follows from each fact: one function for one fact, one module for each slice."""
