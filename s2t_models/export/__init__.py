"""An artifact as a folder that plain transformers, peft and others load, with nothing of this project installed."""
