"""Extended models inside serving engines, where one scale for every text is not enough."""
