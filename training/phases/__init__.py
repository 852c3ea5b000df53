"""What each phase trains, and the loop that all of them share."""
