"""The one kind of exception that is the user's to mend: a sentence with the offending value and what to do."""


class UserError(ValueError):
    pass
