"""What runs next and how much of it: plans, chunk sizes, policies. No torch in here."""
