"""Pages that people read: reports, figures, cards."""
