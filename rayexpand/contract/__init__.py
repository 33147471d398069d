"""What everyone agrees on: errors, random streams, nouns and their Arrow schemas, protocols, settings."""
