"""How the ranks that a client affords are spread over the modules; each rule has a file."""
