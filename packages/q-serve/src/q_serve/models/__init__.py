"""Model families, one module each over shared layers, and how they are built from a Hugging Face directory."""
