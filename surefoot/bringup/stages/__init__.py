"""The stages of a bring-up in their order, each a function from settings and earlier records to one record."""
