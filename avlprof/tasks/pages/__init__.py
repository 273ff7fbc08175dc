"""The picture world of the model `small`: scenes, documents, charts and tables, and questions about them."""
