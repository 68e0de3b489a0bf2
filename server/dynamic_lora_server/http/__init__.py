"""HTTP around the routes: who may enter, what is logged, how errors and streams are written."""
