"""What is measured of a bundle: likeness, times, counted work; and plans by measurement."""
