"""The seam into Hugging Face transformers: everything that knows a host model lives here."""
