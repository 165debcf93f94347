"""What people look at: pages, charts, cards and tables."""
