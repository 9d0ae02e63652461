"""What steering did: behaviour fractions, accuracy, length, loops, divergence, with paired-bootstrap intervals."""
