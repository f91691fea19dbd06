"""Training of the selector, the trigger head and the controls, without Ray."""
