"""Small games whose floor and optimum are known; they need nothing but Python."""
