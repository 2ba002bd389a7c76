"""What every room uses: questions and rollouts, seeds, checks of settings, errors, texts. Imports no other room."""
