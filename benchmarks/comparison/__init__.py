"""One recipe for everything that is compared: what is trained, how it is recorded, what the records say."""
