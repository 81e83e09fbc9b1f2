"""What cannot be measured on one machine, reckoned instead; each says what it takes for granted."""
