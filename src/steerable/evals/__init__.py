"""What steering did: behaviour fractions, accuracy, length, loops and divergence, with their intervals."""
