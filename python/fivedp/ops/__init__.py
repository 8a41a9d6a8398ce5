"""The distributed operations: where the arithmetic of one rank and the messages between ranks meet."""
