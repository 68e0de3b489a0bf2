"""New adapters on their way in: uploads, allowed folders, and the Hub."""
