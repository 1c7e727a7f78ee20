"""Several ranks as one: what each of them holds, runs and says, planned from the declarations alone."""
