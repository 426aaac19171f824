"""Generation: sampling, the loop over tokens, and chat."""
