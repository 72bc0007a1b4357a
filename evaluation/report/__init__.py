"""What is known of artifacts as one document, and the page and the model card that are made of it."""
