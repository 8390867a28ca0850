"""What was measured, for people: tables, figures, and the page that holds them."""
