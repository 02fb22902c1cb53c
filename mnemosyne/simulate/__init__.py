"""What serving would do on hardware nobody has at hand: step times, a cluster, plans. No torch."""
