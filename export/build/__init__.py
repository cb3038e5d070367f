"""Building what targets need beyond a bundle's graphs: a module and a line in `registry` each, one loop for all."""
