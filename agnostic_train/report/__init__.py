"""Results for readers: tables, figures, and the page that holds them."""
