"""Reading and writing: files saved whole or not at all, fetched from the Hub, and read within bounds."""
