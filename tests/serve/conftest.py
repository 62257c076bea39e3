"""The saved model that the tests of the server share."""

from servers import directory

__all__ = ['directory']
