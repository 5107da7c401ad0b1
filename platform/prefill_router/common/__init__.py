"""What everything else stands on: errors, messages, strict models, column schemas."""
