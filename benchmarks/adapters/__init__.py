"""One adapter a system: what sends its tasks, and what runs them."""
