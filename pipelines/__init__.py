"""The stages as Ray jobs, and all that they share. They reach models through serving, or hold an engine in their own
actors."""
