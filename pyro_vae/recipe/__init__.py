"""A fit as configuration: recipes, what they build, and the folders that hold their runs."""

from pyro_vae.recipe.build import build as build
from pyro_vae.recipe.build import load_rows as load_rows
from pyro_vae.recipe.build import parts_of as parts_of
from pyro_vae.recipe.files import read_recipe as read_recipe
from pyro_vae.recipe.files import recipe_of as recipe_of
from pyro_vae.recipe.recipe import Part as Part
from pyro_vae.recipe.recipe import Recipe as Recipe
from pyro_vae.recipe.recipe import Settings as Settings
from pyro_vae.recipe.recipe import Source as Source
from pyro_vae.recipe.run import Run as Run
from pyro_vae.recipe.run import carry_out as carry_out
from pyro_vae.recipe.run import open_run as open_run
from pyro_vae.recipe.run import writable_folder as writable_folder
