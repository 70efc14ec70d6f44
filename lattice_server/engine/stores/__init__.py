"""The head's stores of code and values, their folders, and the count of what each tenant has in them."""
