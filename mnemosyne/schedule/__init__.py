"""The choice of what runs next: plans, chunk sizes, policies. No torch in here."""
