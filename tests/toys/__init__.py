"""A toy of every kind of thing that can be added from outside the package: a module and a registration each."""
