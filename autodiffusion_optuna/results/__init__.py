"""What a study found and how far it is; reads studies, imports no torch."""
